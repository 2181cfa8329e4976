// Package tap writes the Test Anything Protocol: the calls of github.com/mndrix/tap-go that the validation suite
// makes.
package tap

import (
	"encoding/json"
	"fmt"
	"strings"
)

// T is one stream of results on standard output.
type T struct {
	count *int
	todo  string
}

// New returns a stream without results.
func New() *T { return &T{count: new(int)} }

// Todo marks the results that follow as not yet expected.
func (t *T) Todo() *T { return &T{count: t.count, todo: "# TODO "} }

// Header prints the version and, where the number of results is known, the plan.
func (t *T) Header(count int) {
	fmt.Println("TAP version 13")
	if count > 0 {
		fmt.Printf("1..%d\n", count)
	}
}

// AutoPlan prints the plan behind the results.
func (t *T) AutoPlan() { fmt.Printf("1..%d\n", *t.count) }

// Ok prints a result.
func (t *T) Ok(passed bool, description string) {
	*t.count++
	word := "ok"
	if !passed {
		word = "not ok"
	}
	fmt.Printf("%s %d - %s%s\n", word, *t.count, t.todo, description)
}

// Pass prints a result that is ok.
func (t *T) Pass(description string) { t.Ok(true, description) }

// Fail prints a result that is not ok.
func (t *T) Fail(description string) { t.Ok(false, description) }

// Skip prints results that were not looked for.
func (t *T) Skip(count int, description string) {
	for ; count > 0; count-- {
		*t.count++
		fmt.Printf("ok %d # SKIP %s\n", *t.count, description)
	}
}

// Diagnostic prints a remark.
func (t *T) Diagnostic(text string) { fmt.Println("# " + strings.ReplaceAll(text, "\n", "\n# ")) }

// Diagnosticf prints a remark.
func (t *T) Diagnosticf(format string, values ...interface{}) {
	t.Diagnostic(fmt.Sprintf(format, values...))
}

// YAML prints details of the result before, as JSON, which is YAML.
func (t *T) YAML(details interface{}) error {
	text, err := json.Marshal(details)
	if err == nil {
		fmt.Printf("  ---\n  %s\n  ...\n", text)
	}
	return err
}
