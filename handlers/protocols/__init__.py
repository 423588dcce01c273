"""Bodies and headers to requests, and answers to bodies, whichever server runs."""
