package nbd

import (
	"errors"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"platter/export/nbd/nbdtest"
)

func TestGo(t *testing.T) {
	for _, name := range []string{"", "demo"} {
		c, done := hello(t, nbdtest.FixedNewstyle|nbdtest.NoZeroes)
		if err := c.Go(name); err != nil {
			t.Fatal(err)
		}
		chosen(t, done, demo)
		if c.Size != demo.Size || c.Flags != demo.Flags {
			t.Errorf("client got size %d, flags %#x", c.Size, c.Flags)
		}
		if c.MinBlock != 1 || c.PreferredBlock != 4096 || c.MaxBlock != 32<<20 {
			t.Errorf("client got block sizes %d, %d, %d", c.MinBlock, c.PreferredBlock, c.MaxBlock)
		}
	}
}

// A client that does not claim the fixed newstyle is served all the same: go-nbd
// clients answer the greeting with 0 and go on.
func TestGoWithoutFixedNewstyle(t *testing.T) {
	c, done := hello(t, 0)
	if err := c.Go("demo"); err != nil {
		t.Fatal(err)
	}
	chosen(t, done, demo)
}

func TestInfoTypes(t *testing.T) {
	const unknownType = 0x7777
	both := []uint16{nbdtest.InfoExport, nbdtest.InfoBlockSize}
	for _, tc := range []struct {
		name   string
		export string
		wanted []uint16
		want   []uint16
	}{
		{"nothing asked", "demo", nil, both},
		{"name", "demo", []uint16{nbdtest.InfoName}, append(both, nbdtest.InfoName)},
		{"description", "demo", []uint16{nbdtest.InfoDescription}, append(both, nbdtest.InfoDescription)},
		{"no description", plain.Name, []uint16{nbdtest.InfoDescription}, both},
		{"all", "", []uint16{3, 2, 1, 0}, []uint16{0, 1, 2, 3}},
		{"unknown", "demo", []uint16{unknownType, 1}, append(both, 1)},
		{"twice", "demo", []uint16{1, 1, 3, 3}, append(both, 1)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, done := hello(t, nbdtest.FixedNewstyle)
			infos, err := c.Info(nbdtest.OptInfo, tc.export, tc.wanted...)
			if err != nil {
				t.Fatal(err)
			}
			got := slices.Sorted(maps.Keys(infos))
			slices.Sort(tc.want)
			if !slices.Equal(got, tc.want) {
				t.Errorf("got information %d, want %d", got, tc.want)
			}
			if name, ok := infos[nbdtest.InfoName]; ok && string(name) != demo.Name {
				t.Errorf("canonical name is %q", name)
			}
			if text, ok := infos[nbdtest.InfoDescription]; ok && string(text) != demo.Description {
				t.Errorf("description is %q", text)
			}
			// The information is all there is: the negotiation goes on.
			if err := c.Go(plain.Name); err != nil {
				t.Fatal(err)
			}
			chosen(t, done, plain)
		})
	}
}

func TestUnknownName(t *testing.T) {
	for _, option := range []uint32{nbdtest.OptInfo, nbdtest.OptGo} {
		c, done := hello(t, nbdtest.FixedNewstyle)
		_, err := c.Info(option, "dem")
		refused(t, err, nbdtest.RepErrUnknown, `no export "dem"; ask for one of these: "demo", "größe"`)
		if err := c.Go("demo"); err != nil {
			t.Fatal(err)
		}
		chosen(t, done, demo)
	}
}

func TestUnknownNameMessages(t *testing.T) {
	var many shelf
	for range 10 {
		many = append(many, Offer{Name: strings.Repeat("long\n", 800)})
	}
	for _, tc := range []struct {
		shelf shelf
		name  string
		want  string
	}{
		{nil, "", "there is no default export; nothing is exported"},
		{nil, "a\nb", `there is no export "a\nb"; nothing is exported`},
		{many, "x", "and 2 more"},
	} {
		c, done := start(t, tc.shelf, defaultLimits)
		if err := c.Hello(nbdtest.FixedNewstyle); err != nil {
			t.Fatal(err)
		}
		err := c.Go(tc.name)
		refused(t, err, nbdtest.RepErrUnknown, tc.want)
		if len(err.Error()) > maxString {
			t.Errorf("message of %d bytes", len(err.Error()))
		}
		c.Close()
		failed(t, done, io.EOF)
	}
}

// An export that NBD_OPT_INFO found is not chosen by it.
func TestInfoThenWrongGo(t *testing.T) {
	c, done := hello(t, nbdtest.FixedNewstyle)
	if _, err := c.Info(nbdtest.OptInfo, "demo"); err != nil {
		t.Fatal(err)
	}
	refused(t, c.Go("other"), nbdtest.RepErrUnknown, "other")
	c.Close()
	failed(t, done, io.EOF)
}

func TestInfoRefusals(t *testing.T) {
	long := strings.Repeat("n", maxString)
	for _, tc := range []struct {
		name string
		data []byte
		kind uint32
	}{
		{"empty", nil, nbdtest.RepErrInvalid},
		{"no count", []byte{0, 0, 0, 0, 0}, nbdtest.RepErrInvalid},
		{"name beyond the data", []byte{0, 0, 0, 2, 'a', 0, 0}, nbdtest.RepErrInvalid},
		{"huge name", []byte{255, 255, 255, 255, 0, 0}, nbdtest.RepErrInvalid},
		{"too few requests", []byte{0, 0, 0, 0, 0, 2, 0, 1}, nbdtest.RepErrInvalid},
		{"half a request", []byte{0, 0, 0, 0, 0, 1, 0}, nbdtest.RepErrInvalid},
		{"bytes left over", []byte{0, 0, 0, 0, 0, 0, 0}, nbdtest.RepErrInvalid},
		{"not utf-8", nbdtest.InfoData("demo\xff"), nbdtest.RepErrInvalid},
		{"embedded nul", nbdtest.InfoData("demo\x00"), nbdtest.RepErrInvalid},
		{"longest name", nbdtest.InfoData(long), nbdtest.RepErrUnknown},
		{"name too long", nbdtest.InfoData(long + "n"), nbdtest.RepErrTooBig},
		{"longest data", nbdtest.InfoData("x", make([]uint16, (optionBuffer-7)/2)...), nbdtest.RepErrUnknown},
		{"more data than the buffer", make([]byte, optionBuffer+1), nbdtest.RepErrTooBig},
		{"longest data that is skipped", make([]byte, defaultLimits.skip), nbdtest.RepErrTooBig},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, option := range []uint32{nbdtest.OptInfo, nbdtest.OptGo} {
				c, done := hello(t, nbdtest.FixedNewstyle)
				_, err := c.Option(option, tc.data)
				refused(t, err, tc.kind, "")
				// The data is gone: what follows is understood.
				if err := c.Go("demo"); err != nil {
					t.Fatal(err)
				}
				chosen(t, done, demo)
			}
		})
	}
}

func TestUnsupportedOptions(t *testing.T) {
	for _, tc := range []struct {
		id      uint32
		message string
	}{
		{0, "option 0 "},
		{4, "option 4 "},
		{nbdtest.OptStartTLS, "NBD_OPT_STARTTLS"},
		{nbdtest.OptStructuredReply, "NBD_OPT_STRUCTURED_REPLY"},
		{optListMetaContext, "NBD_OPT_LIST_META_CONTEXT"},
		{optSetMetaContext, "NBD_OPT_SET_META_CONTEXT"},
		{optExtendedHeaders, "NBD_OPT_EXTENDED_HEADERS"},
		{0xffffffff, "option 4294967295 "},
	} {
		c, done := hello(t, nbdtest.FixedNewstyle)
		for _, size := range []uint32{0, 1, optionBuffer, optionBuffer + 1, defaultLimits.skip} {
			_, err := c.Option(tc.id, make([]byte, size))
			refused(t, err, nbdtest.RepErrUnsupported, tc.message)
		}
		if err := c.Go("demo"); err != nil {
			t.Fatal(err)
		}
		chosen(t, done, demo)
	}
}

func TestExportName(t *testing.T) {
	for _, tc := range []struct {
		flags    uint32
		noZeroes bool
	}{
		{0, false}, // plain newstyle
		{nbdtest.FixedNewstyle, false},
		{nbdtest.FixedNewstyle | nbdtest.NoZeroes, true},
		{nbdtest.NoZeroes, true},
	} {
		for name, want := range map[string]Offer{"": demo, "demo": demo, plain.Name: plain} {
			c, done := hello(t, tc.flags)
			if err := c.ExportName(name); err != nil {
				t.Fatal(err)
			}
			got := <-done
			if got.err != nil || got.offer != want || got.noZeroes != tc.noZeroes {
				t.Errorf("flags %#x: got %+v", tc.flags, got)
			}
			if c.Size != want.Size || c.Flags != want.Flags {
				t.Errorf("client got size %d, flags %#x", c.Size, c.Flags)
			}
		}
	}
}

func TestExportNameRefusals(t *testing.T) {
	for _, tc := range []struct {
		name   string
		export string
		want   error
	}{
		{"unknown", "other", errUnknownExport},
		{"not utf-8", "demo\xff", errUnknownExport},
		{"embedded nul", "demo\x00", errUnknownExport},
		{"longest", strings.Repeat("n", maxString), errUnknownExport},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, done := hello(t, nbdtest.FixedNewstyle)
			if err := c.ExportName(tc.export); !errors.Is(err, io.EOF) {
				t.Errorf("client got %v, want the end of the connection", err)
			}
			failed(t, done, tc.want)
		})
	}
	t.Run("too long", func(t *testing.T) {
		c, done := hello(t, nbdtest.FixedNewstyle)
		if err := c.SendOption(nbdtest.OptExportName, maxString+1, nil); err != nil {
			t.Fatal(err)
		}
		closed(t, c)
		failed(t, done, errOptionTooBig)
	})
}

func TestList(t *testing.T) {
	c, done := hello(t, nbdtest.FixedNewstyle)
	got, err := c.List()
	want := []nbdtest.Listed{{Name: "demo", Description: "the first disk"}, {Name: "größe"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("list is %q, %v", got, err)
	}
	_, err = c.Option(nbdtest.OptList, []byte("x"))
	refused(t, err, nbdtest.RepErrInvalid, "no data")
	if err := c.Go("größe"); err != nil {
		t.Fatal(err)
	}
	chosen(t, done, plain)
}

func TestListEmptyAndLong(t *testing.T) {
	var long shelf
	for range 40 { // more than what is sent at a time
		long = append(long, Offer{Name: strings.Repeat("n", maxString), Description: strings.Repeat("ü", maxString)})
	}
	for _, s := range []shelf{nil, long} {
		c, done := start(t, s, defaultLimits)
		if err := c.Hello(nbdtest.FixedNewstyle); err != nil {
			t.Fatal(err)
		}
		got, err := c.List()
		if err != nil || len(got) != len(s) {
			t.Fatalf("list has %d exports, %v, want %d", len(got), err, len(s))
		}
		for _, export := range got {
			if export.Name != s[0].Name || export.Description != strings.Repeat("ü", maxString/2) {
				t.Fatalf("list has %d bytes of name, %d of description", len(export.Name), len(export.Description))
			}
		}
		if err := c.Abort(); err != nil {
			t.Fatal(err)
		}
		failed(t, done, errAborted)
	}
}

func TestAbort(t *testing.T) {
	for _, data := range []string{"", "data is ignored"} {
		c, done := hello(t, nbdtest.FixedNewstyle)
		if replies, err := c.Option(nbdtest.OptAbort, []byte(data)); err != nil || len(replies) != 0 {
			t.Errorf("abort gave %v, %v", replies, err)
		}
		closed(t, c)
		failed(t, done, errAborted)
	}
	t.Run("without waiting", func(t *testing.T) {
		c, done := hello(t, nbdtest.FixedNewstyle)
		if err := c.SendOption(nbdtest.OptAbort, 0, nil); err != nil {
			t.Fatal(err)
		}
		c.Close()
		failed(t, done, errAborted)
	})
}
