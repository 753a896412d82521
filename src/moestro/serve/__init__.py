"""A model served over HTTP, in the shapes that existing clients speak; the extra `serve`."""
