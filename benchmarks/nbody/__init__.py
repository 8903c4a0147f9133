"""The n-body task of the EGNN paper: attention and EGNN, trained on the same data for the same time."""
