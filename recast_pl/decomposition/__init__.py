"""How a network's weights become shared templates and a few coefficients; knows no task."""
