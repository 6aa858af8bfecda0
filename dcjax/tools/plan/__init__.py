"""`dcjax plan`: what a run would take of a slice that is not there, from its compiled programs."""
