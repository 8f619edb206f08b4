"""`normfree data`: its commands."""
