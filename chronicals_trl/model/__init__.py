"""Which instance of a model gets what: matching by structure, verification by number, patching of single modules."""
