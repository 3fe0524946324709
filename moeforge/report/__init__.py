"""Results in words and pictures: model card, plots, reports."""
