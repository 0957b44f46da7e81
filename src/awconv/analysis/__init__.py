"""What one runs beside training: measurements of what AW-convolution costs."""
