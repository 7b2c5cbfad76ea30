"""Key-value stores on passive memory nodes: pDPM-Direct, pDPM-Central, Clover; and what checks them."""
