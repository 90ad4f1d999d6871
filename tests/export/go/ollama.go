// Renders Ollama's Go templates with the values that Ollama gives them, for comparison.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string
	Content string
}

type asked struct {
	Template string
	Messages []message
}

func main() {
	var all []asked
	if err := json.NewDecoder(os.Stdin).Decode(&all); err != nil {
		panic(err)
	}
	said := []string{}
	for _, one := range all {
		system := []string{}
		joined := []*message{}
		for i := range one.Messages {
			m := &one.Messages[i]
			if m.Role == "system" {
				system = append(system, m.Content)
			}
			if n := len(joined); n > 0 && joined[n-1].Role == m.Role {
				joined[n-1].Content += "\n\n" + m.Content
			} else {
				joined = append(joined, m)
			}
		}
		values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": joined, "Response": ""}
		var out strings.Builder
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		if err := parsed.Execute(&out, values); err != nil {
			panic(err)
		}
		said = append(said, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(said)
}
