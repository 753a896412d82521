"""What is known of transformers' classes: routers, expert layouts, taps, hooks."""
