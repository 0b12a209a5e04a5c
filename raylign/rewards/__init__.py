"""Pure reward models over cached features."""
