"""The network: torch alone, but for the filterbank; imports no other wing."""
