"""The network: torch alone, and nothing of the other wings."""
