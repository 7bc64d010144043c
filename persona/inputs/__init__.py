"""Read input files: histories, requests and LaMP questions."""
