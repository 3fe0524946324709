"""Verbs that read artifacts and answer: show, verify, diff, report."""
