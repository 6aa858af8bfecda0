"""`dcjax probe`: takes apart the gap between the policies, source by source."""
