"""Similarity of experts as mergeable sums; one metric, one file."""
