// Platter serves disk images, and makes and inspects them. See README.md.
package main

import (
	"os"

	"platter/cli"
)

// version is set by the Makefile.
var version string

func main() {
	os.Exit(cli.Run(os.Args[1:], version))
}
