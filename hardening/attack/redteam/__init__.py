"""Black-box attacks on a running endpoint: what somebody achieves who sees only its answers.

Each 8-bit PNG counts as one query. The first one inside the Linf ball that is accepted under a
wrong label fools. No image is sent twice: ART asks for the same one up to three times in a row.
"""

from rampart.hardening.attack.redteam.endpoint import Answer, Endpoint
from rampart.hardening.attack.redteam.probe import Outcome, Probe, Settings
from rampart.hardening.attack.redteam.run import FILE, read, redteam
from rampart.hardening.attack.redteam.searches import ATTACKS

__all__ = [
    "ATTACKS",
    "FILE",
    "Answer",
    "Endpoint",
    "Outcome",
    "Probe",
    "Settings",
    "read",
    "redteam",
]
