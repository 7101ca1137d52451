"""Plans that are checked as soon as they are made, and which of their pieces stream."""

from blockswap import _C


def planned(request):
    plan = _C.make_plan(request)
    _C.validate(plan, request)
    return plan


def streamed(plan):
    return [i for i, piece in enumerate(plan.pieces) if not piece.resident]
