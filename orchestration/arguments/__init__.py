"""The arguments of `normfree`, by what its commands are for; what they do is `orchestration.commands`."""
