"""What a method has to know of a model before it is exported: one calibrator per method, found by the method's name."""
