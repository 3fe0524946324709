"""One run of one verb: an artifact reference in, a stage, an artifact reference out."""
