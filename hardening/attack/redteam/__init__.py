"""Black-box attacks on a running endpoint, which show an attacker its answers alone. A query is an
8-bit PNG, and no image is sent twice. One inside the Linf ball, accepted under a wrong label,
fools.
"""

from rampart.hardening.attack.redteam.endpoint import Endpoint
from rampart.hardening.attack.redteam.probe import Outcome, Probe, Settings
from rampart.hardening.attack.redteam.protocols import Wire
from rampart.hardening.attack.redteam.run import read, redteam
from rampart.hardening.attack.redteam.said import Answer
from rampart.hardening.attack.redteam.searches import ATTACKS, DECISION_BASED

__all__ = [
    "ATTACKS", "DECISION_BASED", "Answer", "Endpoint", "Outcome", "Probe", "Settings", "Wire",
    "read", "redteam",
]  # fmt: skip
