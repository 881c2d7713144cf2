"""The network: torch alone; imports no other wing."""
