package config

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestParseQueueLoops(t *testing.T) {
	for in, want := range map[string]QueueLoops{
		"0":            {"", []int{0}},
		"0,1,0,1":      {"", []int{0, 1, 0, 1}},
		" 2 , 255":     {"", []int{2, 255}},
		"disk=1":       {"disk", []int{1}},
		"a=b=3,2":      {"a=b", []int{3, 2}},
		"=4":           {"", []int{4}},
		"x=0" + many(): {"x", make([]int, MaxQueues)},
	} {
		got, err := ParseQueueLoops(in)
		if err != nil || got.Export != want.Export || !slices.Equal(got.Loops, want.Loops) {
			t.Errorf("ParseQueueLoops(%.20q) = %v, %v; want %v", in, got, err, want)
		}
	}
	for in, word := range map[string]string{
		"": "0,1", "disk=": "0,1", ",": "0,1", "0,": "0,1", "a": "0,1", "0;1": "0,1", "1.5": "0,1", "99999999999999999999": "0,1",
		"-1": "no loop -1", "0,256": "255", "0,0" + many(): "1024",
	} {
		if got, err := ParseQueueLoops(in); !errors.Is(err, ErrQueueLoops) || !strings.Contains(err.Error(), word) {
			t.Errorf("ParseQueueLoops(%.20q) = %v, %v; want %q", in, got, err, word)
		}
	}
}

// many is all of the longest list but its first item.
func many() string { return strings.Repeat(",0", MaxQueues-1) }
