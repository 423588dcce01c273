"""How all drawings look."""

from typing import Any

# A class may be called "$": no text is a formula. The salt makes the same figures the same file.
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,
    "svg.hashsalt": "rampart",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
