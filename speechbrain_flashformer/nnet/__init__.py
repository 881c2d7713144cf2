"""The network. It needs only torch and imports no other subpackage."""
