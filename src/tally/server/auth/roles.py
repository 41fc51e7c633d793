"""Who may do what. Each role may do all that those before it may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Role: TypeAlias = Literal["viewer", "operator", "admin"]
"""viewer: look. operator: start, stop and change jobs, schedules and aliases. admin: keys, and what is deleted."""

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request comes from. key_id: the key that proved it, also where a session stands for the key."""

    name: str
    role: Role
    key_id: str

    def may(self, role: Role) -> bool:
        """Whether this principal has the role, or one that includes it."""
        return ROLES.index(self.role) >= ROLES.index(role)
