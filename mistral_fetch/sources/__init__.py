"""Places bytes come from. Each source fills the partials it is handed and knows nothing of the store around them."""
