"""Images in: where they are, their pixels, which of them a step takes, and which patches of them."""
