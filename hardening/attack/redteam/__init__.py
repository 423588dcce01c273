"""Black-box attacks on a running endpoint, which show an attacker its answers alone. A query is an
8-bit PNG, and no image is sent twice. One inside the Linf ball, accepted under a wrong label,
fools.
"""

from rampart.hardening.attack.redteam.endpoint import Answer, Endpoint
from rampart.hardening.attack.redteam.probe import Outcome, Probe, Settings
from rampart.hardening.attack.redteam.run import read, redteam
from rampart.hardening.attack.redteam.searches import ATTACKS

__all__ = ["ATTACKS", "Answer", "Endpoint", "Outcome", "Probe", "Settings", "read", "redteam"]
