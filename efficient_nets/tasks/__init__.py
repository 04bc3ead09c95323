"""What a net is trained for: its loss, its metrics, its evaluation."""
