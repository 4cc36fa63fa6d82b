"""Python face of csrc/: each operator with its shapes, its fake and its plain reference."""
