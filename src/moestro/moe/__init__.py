"""The mixture: a router sends tokens to experts, dispatch groups them, combine puts them back."""
