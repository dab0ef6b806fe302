"""The way of the gateway to an engine that listens on another address than the loopback's.

The gateway's unit lets it connect to loopback addresses only. An engine that was told to listen on one address of the
network (`--host 192.168.1.5`) is at that address only, on this machine too.
"""

from __future__ import annotations

from gpusvc.errors import GpusvcError
from gpusvc.log import log
from gpusvc.paths import is_user_instance
from gpusvc.systemd.units import set_properties

_GATEWAY = "gpusvc-gateway.service"


def let_gateway_reach(address: str) -> None:
    """Let the gateway connect to ``address`` until the next boot.

    It is an address of this machine, as an engine listens there. A user's gateway may connect to any address.
    """
    if is_user_instance():
        return
    try:
        set_properties(_GATEWAY, {"IPAddressAllow": address})
    except GpusvcError as error:
        log(4, f"The gateway may not reach the engine at {address}: {error}")
