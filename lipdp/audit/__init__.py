"""Attacks: what holds the claimed bounds against what can be attained."""

from lipdp.audit.attack import AttackResult, attack_bounds

__all__ = ["AttackResult", "attack_bounds"]
