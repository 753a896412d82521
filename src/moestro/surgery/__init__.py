"""One checkpoint made into another: upcycled, pruned, merged, with what each costs."""
