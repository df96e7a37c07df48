"""Per-sample capture: what every use of a parameter leaves behind, in its smallest exact form."""
