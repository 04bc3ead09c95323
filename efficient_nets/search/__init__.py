"""Search for nets: the auto-builder, which takes layers out of a net that is trained."""
