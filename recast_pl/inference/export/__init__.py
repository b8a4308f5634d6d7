"""Export of trained tasks as models that do not need recast_pl: plain weights, programs, ONNX graphs, a web page."""
