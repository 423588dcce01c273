"""Black-box attacks on a running endpoint: what somebody achieves who sees only its answers.

Sent are 8-bit PNGs, each counts as one query, and an image is fooled by the first one inside the
Linf ball that comes back accepted under a wrong label. An answer is remembered, so nothing is sent
twice: ART asks for the same image up to three times in a row.
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
