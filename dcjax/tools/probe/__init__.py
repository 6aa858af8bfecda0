"""`dcjax probe`: the gap between the policies taken apart. Imports everything but the loop."""
