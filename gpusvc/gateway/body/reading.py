"""What follows from a scanner's results: the bytes of the body that change, and the error if there is no model."""

from __future__ import annotations

from typing import Final

from gpusvc.config.serving import Serving
from gpusvc.gateway.body.edits import Cut, filters, object_cuts, rename_cut
from gpusvc.gateway.body.fields import FieldScanner
from gpusvc.gateway.body.multipart import FormScanner, boundary_of, is_form
from gpusvc.gateway.http.replies import HttpError
from gpusvc.quantity import format_size

JSON: Final = b"application/json"

_CUT_OFF: Final = "The request's body is not valid JSON: it ends too early."


def make_scanner(content_type: bytes | None) -> FieldScanner | FormScanner:
    """Return a scanner for the body. Bodies that are not forms are read as JSON: many clients send a wrong type."""
    if content_type is not None and is_form(content_type):
        return FormScanner(boundary_of(content_type))
    return FieldScanner()


def cuts(scanner: FieldScanner | FormScanner, serving: Serving, *, is_ended: bool) -> tuple[Cut, ...] | None:
    """Return the changes to a body; None: the scanner must read more first.

    Raises:
        HttpError: 400, the model's filter applies, but the body is not valid JSON.
    """
    is_settled = is_ended or scanner.settled
    if isinstance(scanner, FormScanner):
        if not is_settled:
            return None
        if scanner.model_span is None or serving.served_name is None:
            return ()
        return (Cut(*scanner.model_span, serving.served_name.encode()),)
    if not filters(serving):
        if not is_settled:
            return None
        member = scanner.model_member
        return () if member is None or serving.served_name is None else (rename_cut(member, serving.served_name),)
    if scanner.closed is not None and scanner.problem is None:
        return object_cuts(scanner.members, scanner.closed, serving)
    if scanner.opened and (scanner.problem is not None or is_ended):
        raise HttpError(400, scanner.problem or _CUT_OFF)
    # A body that is not an object has no members to change.
    return () if scanner.problem is not None or is_ended else None


def no_model(scanner: FieldScanner | FormScanner, content_type: bytes | None) -> HttpError:
    """Return the error for a body that names no model. Call it when the scanner is settled."""
    if isinstance(scanner, FormScanner):
        message = scanner.problem or "The request's form names no model."
        return HttpError(400, message, hint='Give its name in a field "model".', param="model")
    if scanner.problem is not None and (scanner.opened or (content_type or b"").lower().startswith(JSON)):
        return HttpError(400, scanner.problem, param="model" if '"model"' in scanner.problem else None)
    if scanner.opened and scanner.closed is None and scanner.problem is None:
        return HttpError(400, _CUT_OFF)
    return HttpError(
        400,
        "The request names no model.",
        hint='Give its name in a member "model" of the JSON body.',
        param="model",
    )


def too_large(limit_bytes: int) -> HttpError:
    return HttpError(
        413,
        f"The request's body is larger than {format_size(limit_bytes)}.",
        hint="The key max_body in the section [gateway] of gpusvc.toml is the limit.",
        close=True,
    )
