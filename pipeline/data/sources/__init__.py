"""Where raw images come from: cards, folders, archives, lists."""
