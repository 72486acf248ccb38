"""The operator's workspaces: open one, look at it, suspend and resume it."""

from datetime import datetime
from typing import Any

from msgspec import Struct

from accounting import workspaces
from accounting.workspaces import Workspace
from admin_api.call import Call
from admin_api.payloads import Body, Email, Name, Usd


class NewWorkspace(Body):
    name: Name
    email: Email | None = None


class WorkspaceSummary(Struct, kw_only=True):
    """`status`: `active` or `suspended`."""

    workspace_id: str
    name: str
    email: str | None
    kind: str
    tier: str
    status: str
    created_at: datetime


class WorkspaceDetails(WorkspaceSummary, kw_only=True):
    """With its wallet: available = balance (settled) − held by open requests."""

    balance_usd: Usd
    held_usd: Usd
    available_usd: Usd
    currency: str = "USD"


async def create(call: Call[NewWorkspace]) -> WorkspaceSummary:
    workspace_id = call.attempt.resource_id
    if call.attempt.done:
        return _summary(await workspaces.get(call.pool, workspace_id))
    body = call.body
    return _summary(
        await workspaces.create(
            call.pool, call.redis, body.name, body.email, workspace_id=workspace_id
        )
    )


async def get(call: Call[Body]) -> WorkspaceDetails:
    workspace = await workspaces.get(call.pool, call.identifier("ws"))
    balance = await workspaces.balance(call.redis, workspace.id)
    return WorkspaceDetails(
        **_fields(workspace),
        balance_usd=Usd(balance.settled_ucr),
        held_usd=Usd(balance.held_ucr),
        available_usd=Usd(balance.available_ucr),
    )


async def suspend(call: Call[Body]) -> WorkspaceSummary:
    workspace_id = call.identifier("ws")
    if call.attempt.done:
        return _summary(await workspaces.get(call.pool, workspace_id))
    return _summary(await workspaces.suspend(call.pool, call.redis, workspace_id))


async def resume(call: Call[Body]) -> WorkspaceSummary:
    workspace_id = call.identifier("ws")
    if call.attempt.done:
        return _summary(await workspaces.get(call.pool, workspace_id))
    return _summary(await workspaces.resume(call.pool, call.redis, workspace_id))


def _summary(workspace: Workspace) -> WorkspaceSummary:
    return WorkspaceSummary(**_fields(workspace))


def _fields(workspace: Workspace) -> dict[str, Any]:
    return {
        "workspace_id": workspace.id,
        "name": workspace.name,
        "email": workspace.email,
        "kind": workspace.kind,
        "tier": workspace.tier,
        "status": workspace.status,
        "created_at": workspace.created_at,
    }
