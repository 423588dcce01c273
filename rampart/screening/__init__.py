"""Verdicts on a store of pictures, offline: by the code that answers requests, and no server."""
