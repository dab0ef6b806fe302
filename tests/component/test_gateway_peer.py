"""Requests go to the engine alone, whoever listens on its port by the time they are sent."""

from __future__ import annotations

from gpusvc.linux import sockets
from tests.component.rig import Rig, Run, run
from tests.component.upstream import raw, whole

__all__ = ["run"]

CALLED_OFF = b'HTTP/1.1 409 Conflict\r\n\r\n{"error": {"message": "qwen did not start.", "code": "stopped"}}'


def group_at(port: int) -> int:
    """The control group of the socket that listens there."""
    (group,) = {found.cgroup_id for found in sockets.listeners() if found.port == port}
    assert group is not None
    return group


def test_the_engine_of_the_lease_gets_the_request(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.mark_ready("qwen", rig.engine.port, cgroup_id=group_at(rig.engine.port))
        assert (await (await rig.client()).ask()).status == 200
        assert rig.api.requests == []

    run(scenario)


def test_another_program_on_the_port_gets_no_byte(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.mark_ready("qwen", rig.engine.port, cgroup_id=group_at(rig.engine.port) + 1)
        rig.api.answer = raw(CALLED_OFF, then="close")
        client = await rig.client()
        for _ in range(2):
            assert (await client.ask()).status == 409
        assert rig.engine.requests == []
        await rig.eventually(lambda: rig.engine.open == 0)

    run(scenario)


def test_requests_are_served_again_by_the_next_run_of_the_model(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        own = group_at(rig.engine.port)
        rig.mark_ready("qwen", rig.engine.port, cgroup_id=own + 1)

        async def start(request: object, connection: object) -> None:
            rig.mark_ready("qwen", rig.engine.port, cgroup_id=own)
            await whole(b"{}")(request, connection)  # type: ignore[arg-type]

        rig.api.answer = start
        assert (await (await rig.client()).ask()).status == 200
        assert len(rig.api.requests) == len(rig.engine.requests) == 1

    run(scenario)


def test_a_page_of_the_engine_is_asked_of_the_engine_alone(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.mark_ready("qwen", rig.engine.port, cgroup_id=group_at(rig.engine.port) + 1)
        rig.api.answer = raw(CALLED_OFF, then="close")
        assert (await (await rig.client()).get("/upstream/qwen/page")).status == 409
        assert rig.engine.requests == []

    run(scenario)


def test_a_lease_of_an_older_launcher_is_believed(run: Run) -> None:
    async def scenario(rig: Rig) -> None:
        rig.mark_ready("qwen", rig.engine.port)
        assert (await (await rig.client()).ask()).status == 200

    run(scenario)
