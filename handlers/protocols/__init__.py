"""Bodies and headers to requests, and answers to bodies; no server is known here."""
