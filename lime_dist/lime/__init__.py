"""LIMe itself: the model as one stage of it sees it, on one device or over a tensor group through `Parts`."""
