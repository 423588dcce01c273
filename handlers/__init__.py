"""The serving half of Rampart: from request bytes to a verdict, without torch."""
